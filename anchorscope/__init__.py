"""AnchorScope: what do your attention heads keep?"""
