"""Control: exact discrete adjoints that fit drift and diffusion, and the dynamic-programming optimum beside them."""

from kolmo.control.minimize import hessian_product, minimize
from kolmo.control.value import expected_value, value

__all__ = ["expected_value", "hessian_product", "minimize", "value"]
