"""A small student under a larger teacher: the first three layers of all-MiniLM-L6-v2 learn from a cross-encoder of six.

ernie-jax run configs/quickstart.py --output runs/quickstart       (its encoder is where the cross-encoder starts)
ernie-jax ablate configs/small_student.py --output runs/small_student
"""
