"""A Recipe becomes a Composer Trainer. The only folder that imports Composer."""
