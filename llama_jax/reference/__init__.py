"""The oracle: a Llama in NumPy float64, straight from the equations, that shares no code with the model it judges."""
