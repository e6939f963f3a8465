"""What the records in a run folder must hold."""

import datetime

from kolmo.files import schema

# Bytes of a line of metrics.jsonl.
MAX_LINE = 2**20

_STATES = ("running", "done", "failed", "interrupted")
CONFIG = schema.table({"name": schema.text(), "config": schema.mapping(schema.anything)})
STATUS = schema.table(
    {"state": schema.text(_STATES), "message": schema.text(), "time": schema.text(), "owner": schema.anything},
    absent=["owner"],
)
_WORDS = schema.mapping(schema.optional(schema.text()))
ENVIRONMENT = schema.table(
    {
        "python": schema.text(),
        "platform": schema.text(),
        "cores": schema.optional(schema.whole(0)),
        "packages": _WORDS,
        "git": schema.optional(schema.text()),
        "threads": schema.mapping(schema.anything),
        "seeds": schema.many(schema.whole()),
        "resumed": schema.many(
            schema.table({"time": schema.text(), "changes": schema.mapping(schema.pair(schema.anything))})
        ),
    },
    absent=["resumed"],
)
LINE = schema.mapping(schema.anything)


def moment() -> str:
    """The present time, as records state it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
