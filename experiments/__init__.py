"""The experiments of kolmo: one short file each, run by ``kolmo experiment NAME``.

``kolmo list`` names them with the first line of their docstring. `kolmo.experiments` says what such a file contains
and finds them, here in a source tree and inside the package when it is installed; a file whose name starts with an
underscore is no experiment and may hold what several share (``from kolmo.experiments import _name``).
"""
