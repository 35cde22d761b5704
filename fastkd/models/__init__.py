"""Models: taps into a running encoder, students made from a teacher or of another architecture, layer replacement."""

from fastkd.models.architectures import Architecture, embeddings_of, register_architecture
from fastkd.models.bilstm import BiLstmConfig, BiLstmForSequenceClassification, create_bilstm
from fastkd.models.replacement import ReplaceableEncoder
from fastkd.models.schedules import ReplacementSchedule, effective_rate
from fastkd.models.student import create_student
from fastkd.models.tap import Taps, tap

__all__ = [
    "Architecture",
    "BiLstmConfig",
    "BiLstmForSequenceClassification",
    "ReplaceableEncoder",
    "ReplacementSchedule",
    "Taps",
    "create_bilstm",
    "create_student",
    "effective_rate",
    "embeddings_of",
    "register_architecture",
    "tap",
]
