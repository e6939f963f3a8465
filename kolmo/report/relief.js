// Draws each <figure class="relief">: a surface over a plane, turned by dragging or the arrow keys, and a slider over
// its levels. The data is the JSON beside the canvas; the projection is orthographic, far cells are painted first.
"use strict";
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), k = Math.min(Math.floor(place), CIVIDIS.length - 2);
  const mixed = CIVIDIS[k].map((c, i) => Math.round(c + (place - k) * (CIVIDIS[k + 1][i] - c)));
  return `rgb(${mixed.join(",")})`;
}

function relief(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), pen = canvas.getContext("2d");
  const slider = figure.querySelector("input"), output = figure.querySelector("output");
  const [low, high] = data.range, range = high - low || 1;
  const shown = (h) => (data.log ? 10 ** h : h).toPrecision(3).replace(/\.?0+$|(\.\d*?)0+$/, "$1");
  const scaled = (axis) => axis.map((value) => 2 * (value - axis[0]) / (axis[axis.length - 1] - axis[0]) - 1);
  const [x, y] = data.axes.map(scaled);
  let turn = 0.6, tilt = 0.6;  // radians: about the vertical, and above the plane

  function draw() {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const size = 0.31 * Math.min(width, 1.25 * height), [c, s] = [Math.cos(turn), Math.sin(turn)];
    const project = (u, v, w) => {  // w: 0 at the bottom, 1 at the top
      const away = u * s + v * c;
      return [width * 0.46 + size * (u * c - v * s),
        height * 0.47 - size * (1.1 * (w - 0.5) * Math.cos(tilt) + away * Math.sin(tilt)), away];
    };
    const path = (points) => {
      pen.beginPath();
      points.forEach(([a, b], i) => (i ? pen.lineTo(a, b) : pen.moveTo(a, b)));
    };
    const text = (string, a, b, align = "center") => {
      pen.textAlign = align;
      pen.fillText(string, a, b);
    };

    // the ground, and what its two near edges are
    pen.strokeStyle = "#aab2be";
    pen.fillStyle = "#566072";
    pen.font = `${width < 480 ? 11 : 13}px system-ui, sans-serif`;
    path([[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([u, v]) => project(u, v, 0)));
    pen.closePath();
    pen.stroke();
    for (const [k, ends] of [[0, (side) => [0, side]], [1, (side) => [side, 0]]]) {
      const near = [-1, 1].sort((a, b) => project(...ends(a), 0)[2] - project(...ends(b), 0)[2])[0];
      const [a, b] = project(...ends(1.28 * near), 0);
      text(data.labels[k], a, b + 4);
    }

    const heights = data.heights[slider.value], cells = [];
    for (let i = 0; i + 1 < x.length; i++) {
      for (let j = 0; j + 1 < y.length; j++) {
        const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
        const own = corners.map(([p, q]) => heights[p][q]);
        if (own.includes(null)) continue;
        const points = corners.map(([p, q], k) => project(x[p], y[q], (own[k] - low) / range));
        const mean = own.reduce((a, b) => a + b) / 4;
        cells.push([points.reduce((a, point) => a + point[2], 0), points, colour((mean - low) / range)]);
      }
    }
    cells.sort((a, b) => b[0] - a[0]);
    pen.lineWidth = 0.6;
    for (const [, points, fill] of cells) {
      path(points);
      pen.closePath();
      pen.fillStyle = fill;
      pen.fill();
      pen.strokeStyle = cells.length > 1200 ? fill : "rgba(255,255,255,0.25)";
      pen.stroke();
    }

    // the scale, the same for all levels
    const bar = { left: width - (width < 480 ? 52 : 72), top: height * 0.22, tall: height * 0.56 };
    for (let k = 0; k < 64; k++) {
      pen.fillStyle = colour(1 - k / 63);
      pen.fillRect(bar.left, bar.top + k * bar.tall / 64, 12, bar.tall / 64 + 1);
    }
    pen.fillStyle = "#566072";
    text(shown(high), bar.left + 17, bar.top + 9, "left");
    text(shown(data.log || low < high ? (low + high) / 2 : low), bar.left + 17, bar.top + bar.tall / 2 + 4, "left");
    text(shown(low), bar.left + 17, bar.top + bar.tall, "left");
    text(data.log ? `${data.name} (log)` : data.name, width - 4, bar.top - 10, "right");

    const level = heights.flat().filter((h) => h !== null);
    const named = data.levels.length > 1 ? `${data.levels[slider.value]}: ` : "";
    output.textContent = `${named}${data.name} from ${shown(Math.min(...level))} to ${shown(Math.max(...level))}`;
  }

  function turned(across, up) {
    turn -= across;
    tilt = Math.min(Math.max(tilt + up, 0.1), 1.5);
    draw();
  }

  slider.addEventListener("input", draw);
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) turned(event.movementX / 150, event.movementY / 150);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    if (!step) return;
    event.preventDefault();
    turned(...step);
  });
  new ResizeObserver(draw).observe(canvas);
}

document.querySelectorAll("figure.relief").forEach(relief);
