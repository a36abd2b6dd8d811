"""What the package raises when it refuses: one family, catchable as `PhantomError` or `ValueError`."""


class PhantomError(ValueError):
    """A request that cannot be carried out; the message names what, the sizes and the cure."""


class PlanError(PhantomError):
    """A plan that cannot be carried out, or a module in which nothing qualifies. Nothing has been changed."""


class LayoutError(PhantomError):
    """A layer inside a proven chain was called where the sharded layout does not hold."""


class CheckpointError(PhantomError):
    """A checkpoint that does not fit the model, is damaged, or is not ours. No weight has been changed."""
