"""The maths on tensors: one folder per operation. Holds no imports (other libraries find and import this folder)."""
