"""Do two programs agree on a policy? The certificate over their log-probabilities."""

from __future__ import annotations

from m4ov_kernels.numerics.certificate import Certificate, Group, Token
from m4ov_kernels.numerics.compare import CLASSES, QUANTILES, certify

__all__ = ["CLASSES", "QUANTILES", "Certificate", "Group", "Token", "certify"]
