"""Pages and files about runs: plan, report, model card, goodput, reproduction; GPU data sheets and model shapes."""
