"""Safetensors files of averages: written all or nothing, read without a copy, and the mean of several.

Which file answers what:

* `_format`: a file is written, or read as views; `_replace`: how a file takes another's place, crash or not.
* `_header`: how named arrays lie in a file; `_json`, `_source`: reading what anyone may have written.
* `_mean`: the mean of checkpoints, by the `_shares` of each; `_checkpoints`: files and folders of shards;
  `_pieces`: files that are computed from others; `_between`: the mean between two running means; `_choice`:
  which files are merged.
* `_state`: an EMA's state in a file, of which `_plain` is no array; `_sets`: sharded values in several.
"""

from ._between import between
from ._format import File, write
from ._mean import average
from ._shares import shares

__all__ = ["File", "average", "between", "shares", "write"]
