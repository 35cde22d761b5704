"""Loss modules over the ops: weights, reductions, projections."""

from fastkd.losses.layer_contrast import LayerContrast
from fastkd.losses.relation_kl import RelationKL
from fastkd.losses.soft_labels import soft_label_loss

__all__ = ["LayerContrast", "RelationKL", "soft_label_loss"]
