"""Why is it robust, and at what price: plain functions on tensors."""

from unmoved.analyses import bias_variance

__all__ = ["bias_variance"]
