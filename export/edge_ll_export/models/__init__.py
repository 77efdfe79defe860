"""Teacher and student: the networks of a recipe."""

from edge_ll_export.models.backbones import build_backbone
from edge_ll_export.models.student import Student, build_student
from edge_ll_export.models.tails import build_tail
from edge_ll_export.models.teacher import build_teacher

__all__ = ["Student", "build_backbone", "build_student", "build_tail", "build_teacher"]
