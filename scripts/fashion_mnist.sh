#!/bin/sh
# Installs the images that the demo prefers, where it may. Never fails: scikit-learn's digits take their place.
[ -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] && exit 0
sh "$(dirname "$0")/apt_install.sh" dataset-fashion-mnist ||
  echo "Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist); the demo takes scikit-learn's digits instead"
exit 0
