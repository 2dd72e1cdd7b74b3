"""The judge as `ldm.evaluation` takes it: the same features and readings as the benchmarks have."""

import torch

from ldm.evaluation.features import open_classifier, open_features
from tests.benchmarks import cifar10_classifier


def test_is_a_feature_network_and_a_reader():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, features = cifar10_classifier.features(cifar10_classifier.load(), images * 2 - 1)
    network, reader = cifar10_classifier.feature_network(), cifar10_classifier.reader()
    assert open_features(network) is network and open_classifier(reader) is reader
    assert (network.size, network.image_size, reader.names) == (256, 32, cifar10_classifier.CLASSES)
    torch.testing.assert_close(network(images), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reader(images), logits, rtol=1e-4, atol=1e-4)
    larger = torch.nn.functional.interpolate(images, 64)
    assert network(larger).shape == (3, 256)
