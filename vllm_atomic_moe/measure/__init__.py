"""What is measured: layers, servers, perplexity as served; and plots."""
