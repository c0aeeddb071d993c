"""From a model and prompts to trained transfer layers and a report, in one resumable command: `ht-train all`."""
