"""Space: coefficients → stencils. One scheme a file; faces, treatment of the terminal data, and the generator."""

from kolmo.schemes.base import SCHEMES as SCHEMES
from kolmo.schemes.base import Scheme as Scheme
from kolmo.schemes.central import Central as Central
from kolmo.schemes.monotone import Monotone as Monotone
