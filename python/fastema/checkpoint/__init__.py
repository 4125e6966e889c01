"""Files of averages: how does one replace another so that no crash breaks it, and what is their mean?"""

from ._format import File, write
from ._mean import average

__all__ = ["File", "average", "write"]
