"""What an MoE layer computes: experts, routing, and the tokens that show it. No library names."""
