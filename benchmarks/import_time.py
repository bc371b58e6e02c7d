"""Processor time of `import fishermask_sk` beyond torch, scikit-learn and skorch.

    python benchmarks/import_time.py

At most 0.3 s is the aim. `python -X importtime -c "import fishermask_sk"` says which
import costs what.
"""

from suite.imports import BELOW, N_PROCESSES, processor_seconds, track_import_seconds

if __name__ == "__main__":
    print(f"Processor seconds, medians of {N_PROCESSES} fresh processes")
    print(f"{processor_seconds(BELOW):8.2f}  {BELOW}")
    print(f"{track_import_seconds():8.2f}  import fishermask_sk after it")
