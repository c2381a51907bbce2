"""What runs next? Requests, pages and the scheduler: plain ints in, plain ints out. No torch, no clock, no sockets."""
