"""Networks with clocks of their own: the public name of :mod:`dni_fx.through_time.collection`."""

from .through_time.collection import Collection as Collection
from .through_time.seats import Link as Link
from .through_time.seats import Member as Member

__all__ = ["Collection", "Link", "Member"]
