"""Do plans keep their promises over all presets, cards and options?"""
