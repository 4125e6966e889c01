"""``python -m fastema demo --methods``: which averages help, measured on small trainings.

* `network`: a network of one hidden layer in NumPy, and its training.
* `tasks`: what is trained on what, and what it is judged by.
* `averages`: all averages of one training.
* `protocol`: which settings there are, how one is chosen, and on which data each is judged.
* `report`: the table, the picture and the command.
"""
