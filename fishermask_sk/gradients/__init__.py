"""Per-sample gradients of a module's class scores, and the Fisher information in them.

Sees tensors and torch modules. Imports nothing of the package but warnings.
Offers `PerSampleGradients` (`per_sample`: diagonal Fisher information, embeddings);
`fisher` has the definitions, `layer_rules` a rule a layer, `generic` what stands in
where no rule holds, `ways` which of them, `layers` head and stem, `working_memory` how
many samples at a time.
"""

from fishermask_sk.gradients.per_sample import PerSampleGradients

__all__ = ["PerSampleGradients"]
