"""What should I run? Memory, time and cost of a deployment before anyone buys or rewires a machine. No torch."""
