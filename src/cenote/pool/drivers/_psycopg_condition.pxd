# Nothing to type: the point is to be called from the compiled desk without a Python frame.
