"""Equal shares per experience, filled by reservoir sampling within each (Avalanche's `ExperienceBalancedBuffer`)."""

from __future__ import annotations

from cl.buffers.class_balanced import ClassBalanced


class ExperienceBalanced(ClassBalanced):
    """As `ClassBalanced`, with experiences in place of classes."""

    group_by = "experience_id"
