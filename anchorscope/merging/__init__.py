"""`merge`: the shards of a run, measured by the jobs of an array, become the folder of a run by one process."""

from anchorscope.merging.run import Merged, merge

__all__ = ["Merged", "merge"]
