"""How fast can it be? The plain torch reference of every op; faster versions stand beside it and must agree with it."""
