"""Architecture search over declared spaces."""

from rnndyn_fast.search.architecture import Architecture, build_network, count_parameters
from rnndyn_fast.search.compare import compare
from rnndyn_fast.search.compare_config import CompareConfig
from rnndyn_fast.search.config import SearchConfig
from rnndyn_fast.search.run import search
from rnndyn_fast.search.space import SPACES, Space, load_space

__all__ = [
    "SPACES", "Architecture", "CompareConfig", "SearchConfig", "Space", "build_network", "compare", "count_parameters", "load_space",
    "search",
]  # fmt: skip
