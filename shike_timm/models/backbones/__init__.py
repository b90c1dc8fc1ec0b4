"""Backbones: split networks of timm, and the CIFAR ResNet, which timm lacks."""
from .backbone import Backbone as Backbone
from .backbone import BackboneFn as BackboneFn
from .backbone import is_column as is_column
from .cifar_resnet import cifar_resnet as cifar_resnet
from .pretrained import Source as Source
from .pretrained import fetching as fetching
from .pretrained import preprocessing as preprocessing
from .pretrained import pretrained_options as pretrained_options
from .split import timm_backbone as timm_backbone
