"""llama_jax: Llama 2 and its family in JAX."""
