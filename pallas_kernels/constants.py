"""Numbers that files, banks and kernels agree on; without jax."""

BASE_SLOT = -1  # of a token without an adapter
RANK_PAGE = 16  # ranks of one page
