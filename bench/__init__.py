"""How fast is it, beside what? Measures Brigade, its peers and the machine. Brigade must not import it."""
