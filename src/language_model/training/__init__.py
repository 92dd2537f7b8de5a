"""How a network learns. It is handed the network, the optimizer and the schedule.

`module.LanguageModel` is the LightningModule; `optimizer` and `schedule` hold functions that ``conf`` names;
`callbacks` holds what happens beside the steps; `checkpoint` saves what exact resuming needs; `hardware` decides
precision, attention and compilation from the machine.
"""
