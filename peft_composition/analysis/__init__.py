"""Looks: what adapters are, how alike they are, and what the mixing weights say. Nothing is trained or saved."""
