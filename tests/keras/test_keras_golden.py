"""Models that older versions saved are loaded with the same bits."""

import json

import numpy as np
import pytest

import golden
from fastema.keras import ExponentialMovingAverage
from processes import output_of, skip_without

VERSIONS = sorted(golden.FOLDER.iterdir())
versions = pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)

LOAD = """
    import json, sys
    import {imports}
    import golden

    model = {library}.models.load_model(sys.argv[1])
    print(json.dumps(golden.encoded(golden.of_model(model))))
"""


@versions
@pytest.mark.parametrize(
    ("name", "library", "imports"),
    [
        ("keras", "keras", "fastema.keras, keras"),
        ("keras-swapped", "keras", "fastema.keras, keras"),
        ("tf-keras", "tf_keras", "tf_keras"),  # which itself imports the module that the file names
    ],
)
def test_a_model_is_loaded_with_its_averages(version, name, library, imports):
    skip_without(library)
    path = version / f"{name}.keras"
    said = output_of(LOAD.format(library=library, imports=imports), path)
    assert json.loads(said.splitlines()[-1]) == golden.read_json(path)


@versions
def test_a_checkpoint_of_an_optimizer_of_keras_2_is_restored(version):
    tf = pytest.importorskip("tensorflow")
    tf_keras = pytest.importorskip("tf_keras", reason="tf_keras is not installed")
    layers = tf_keras.layers
    model = tf_keras.Sequential([tf_keras.Input((3,)), layers.Dense(2, "tanh"), layers.Dense(1)])
    inner = tf_keras.optimizers.legacy.SGD(0.1, momentum=0.5)
    model.compile(ExponentialMovingAverage(inner, average_decay=0.9), loss="mse")
    model.fit(np.ones((1, 3)), np.ones((1, 1)), verbose=0)
    path = version / "tf-keras-legacy"
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(str(path)).assert_consumed()
    assert golden.encoded(golden.of_model(model)) == golden.read_json(path)
