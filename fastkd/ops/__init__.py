"""The fused operators, and the choice of the backend that runs them."""

from fastkd.ops.attribution_distance import attribution_distance
from fastkd.ops.backends import use_backend
from fastkd.ops.cos_nce import cos_nce
from fastkd.ops.relation_kl import relation_kl
from fastkd.ops.sparse_embedding import sparse_embedding

__all__ = ["attribution_distance", "cos_nce", "relation_kl", "sparse_embedding", "use_backend"]
