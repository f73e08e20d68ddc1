"""Every method on one chart."""
