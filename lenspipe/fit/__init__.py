"""Many different lenses fitted in one batched program: maximum a posteriori, then Hamiltonian Monte Carlo."""
