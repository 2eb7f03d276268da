"""From a chain of callbacks to a program: tensors and numbers that write down what is done to them."""
