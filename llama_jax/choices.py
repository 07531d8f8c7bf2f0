"""What settings may be called. Imports nothing: flags are read, and a mistake in them found, before jax is loaded."""

STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")  # of a checkpoint
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")  # of inference
CACHE_DTYPES = ("auto", "int8")  # of keys and values; auto: the compute dtype
# How weights are rounded: the dtype of their values, and the largest.
METHODS = {"int8": ("int8", 127.0), "w8a8": ("int8", 127.0), "int4": ("int4", 7.0), "fp8": ("float8_e4m3fn", 448.0)}
