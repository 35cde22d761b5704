"""Loss modules over the ops: weights, reductions, projections."""

from fastkd.losses.relation_kl import RelationKL

__all__ = ["RelationKL"]
