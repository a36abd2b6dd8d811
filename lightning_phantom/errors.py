"""What the package raises when it refuses: one family, catchable as `PhantomError` or `ValueError`."""


class PhantomError(ValueError):
    """A request that cannot be carried out; the message names what, the sizes and the cure."""


class PlanError(PhantomError):
    """A plan that cannot be carried out, or a module in which nothing qualifies. Nothing has been changed."""


class LayoutError(PhantomError):
    """Ranks that are at different layers, or an operation for which an activation must be whole and is not."""


class CheckpointError(PhantomError):
    """A checkpoint that does not fit the model, is damaged, or is not ours. No weight has been changed."""
