"""The smallest network of each of timm's families as a backbone, with random weights."""
import pytest
import timm
import torch
from torch import nn

import shike_timm

QUICK = {  # one of each kind: its network, and the side of its images if it takes any
    'deit': ('deit_tiny_patch16_224', None),
    'mambaout': ('mambaout_femto', 64),
    'levit': ('levit_128s', None),
    'mobilenetv3': ('mobilenetv3_small_050', 64),
}
FAMILIES = {  # but for deepseek_vit, whose smallest network has 412 million parameters
    'mvitv2': ('mvitv2_tiny', None),
    'xcit': ('xcit_nano_12_p16_224', None),
    'beit': ('beit_base_patch16_224', None),
    'byoanet': ('haloregnetz_b', None),
    'byobnet': ('test_byobnet', None),
    'cait': ('cait_xxs24_224', None),
    'coat': ('coat_lite_tiny', None),
    'convit': ('convit_tiny', None),
    'convmixer': ('convmixer_768_32', 64),
    'convnext': ('test_convnext', 64),
    'cpubone': ('cpubone_nano', 64),
    'csatv2': ('csatv2', 64),
    'cspnet': ('cs3darknet_focus_s', 64),
    'cspnext': ('cspnext_tiny', 64),
    'davit': ('davit_tiny', 64),
    'densenet': ('densenet121', 64),
    'dla': ('dla46x_c', 64),
    'dpn': ('dpn68b', 64),
    'edgenext': ('edgenext_xx_small', 64),
    'efficientformer': ('efficientformer_l1', None),
    'efficientformer_v2': ('efficientformerv2_s0', None),
    'efficientnet': ('test_efficientnet_ln', 64),
    'efficientvit_mit': ('efficientvit_b0', 64),
    'efficientvit_msra': ('efficientvit_m0', None),
    'eva': ('eva02_tiny_patch14_224', None),
    'fasternet': ('fasternet_t0', 64),
    'fastvit': ('fastvit_t8', 64),
    'focalnet': ('focalnet_tiny_srf', 64),
    'gcvit': ('gcvit_xxtiny', None),
    'ghostnet': ('ghostnet_100', 64),
    'hardcorenas': ('hardcorenas_b', 64),
    'hgnet': ('hgnetv2_b0', 64),
    'hiera': ('hiera_tiny_224', None),
    'hieradet_sam2': ('sam2_hiera_tiny', 64),
    'hrnet': ('hrnet_w18_small', 64),
    'iformer': ('iformer_t', 64),
    'inception_next': ('inception_next_atto', 64),
    'inception_resnet_v2': ('inception_resnet_v2', 96),
    'inception_v3': ('inception_v3', 96),
    'inception_v4': ('inception_v4', 96),
    'lcnetv2': ('lcnetv2_small', 64),
    'lowformer': ('lowformer_b0', 64),
    'maxxvit': ('maxvit_rmlp_pico_rw_256', None),
    'metaformer': ('poolformerv2_s12', 64),
    'mlp_mixer': ('resmlp_12_224', None),
    'mobilevit': ('mobilevit_xxs', None),
    'naflexvit': ('naflexvit_base_patch16_parfac_gap', None),
    'nasnet': ('nasnetalarge', 64),
    'nest': ('nest_tiny_jx', None),
    'nextvit': ('nextvit_small', 64),
    'nfnet': ('test_nfnet', 64),
    'pit': ('pit_ti_224', None),
    'pnasnet': ('pnasnet5large', 64),
    'pvt_v2': ('pvt_v2_b0', 64),
    'qwen3_vit': ('qwen3_vit_88m', None),
    'rdnet': ('rdnet_tiny', 64),
    'regnet': ('regnetx_002', 64),
    'repghost': ('repghostnet_050', 64),
    'repvit': ('repvit_m1', None),
    'res2net': ('res2next50', 64),
    'resnest': ('resnest14d', 64),
    'resnet': ('test_resnet', 64),
    'resnetv2': ('resnetv2_18', 64),
    'rexnet': ('rexnet_100', 64),
    'selecsls': ('selecsls60', 64),
    'senet': ('legacy_seresnet18', 64),
    'sequencer': ('sequencer2d_s', None),
    'shvit': ('shvit_s1', 64),
    'sknet': ('skresnet18', 64),
    'starnet': ('starnet_s1', 64),
    'swiftformer': ('swiftformer_xs', None),
    'swin_transformer': ('swin_tiny_patch4_window7_224', None),
    'swin_transformer_v2': ('swinv2_tiny_window16_256', None),
    'swin_transformer_v2_cr': ('swinv2_cr_tiny_ns_224', None),
    'tiny_vit': ('tiny_vit_5m_224', 64),
    'tnt': ('tnt_s_legacy_patch16_224', None),
    'tresnet': ('tresnet_m', 64),
    'twins': ('twins_svt_small', None),
    'vgg': ('vgg11', 64),
    'visformer': ('visformer_tiny', None),
    'vision_transformer': ('test_vit', None),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', None),
    'vision_transformer_relpos': ('vit_srelpos_small_patch16_224', None),
    'vision_transformer_sam': ('samvit_base_patch16', None),
    'vitamin': ('vitamin_small_224', None),
    'volo': ('volo_d1_224', None),
    'vovnet': ('ese_vovnet39b', 64),
    'xception': ('legacy_xception', 64),
    'xception_aligned': ('xception41p', 64),
}


def vectors_to_logits(plain):
    """Weight [1, C, D] and bias [1, C] of a classifier of timm, None if more than a linear one goes with it."""
    heads = plain.get_classifier()
    own = timm.create_model(plain.default_cfg['architecture'], num_classes=0, device='meta').parameters()
    if len(list(own)) + len(list(nn.ModuleList(heads if isinstance(heads, tuple) else [heads]).parameters())) != len(
            list(plain.parameters())):
        return None
    heads = heads if isinstance(heads, tuple) else (heads,)
    if not all(isinstance(head, (nn.Linear, nn.Conv2d)) for head in heads):
        return None
    weight = torch.stack([head.weight.flatten(1) for head in heads])
    bias = torch.stack([head.bias if head.bias is not None else torch.zeros(len(head.weight)) for head in heads])
    return weight.mean(0, keepdim=True), bias.mean(0, keepdim=True)


@pytest.mark.parametrize('name, size', [
    *(pytest.param(*given, id=family) for family, given in QUICK.items()),
    *(pytest.param(*given, id=family, marks=pytest.mark.slow) for family, given in FAMILIES.items())])
def test_the_smallest_of_a_family(name, size, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, drop_rate=0.)
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    images = torch.randn(2, 3, *([size] * 2 if size else plain.default_cfg['input_size'][1:]))
    one = shike_timm.shike(name, num_classes=5, num_experts=1, fusion=False, classifier='linear')
    several = shike_timm.shike(name, num_classes=5, fusion='residual')
    for model in (one, several):
        model.load_backbone(tmp_path / 'weights.pth')
    linear = vectors_to_logits(plain)
    if linear is not None:
        one.classifier.weight.data, one.classifier.bias.data = linear
    else:
        plain.reset_classifier(0)
        one.reset_classifier(0)
    with torch.no_grad():
        features = plain.eval().forward_features(images)
        for own in several.eval().forward_features(images).chunk(3, dim=several.channel_dim):
            torch.testing.assert_close(own, features, rtol=1e-5, atol=1e-5)
        for training in (False, True):
            outputs = []
            for model in (plain.train(training), one.train(training)):
                for module in model.modules():
                    if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
                        module.eval()
                outputs.append(model(images))
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert len(several.feature_info) >= 3 and several.feature_info[-1]['num_chs'] == several.num_features
    trunk = {id(p) for part in (several.stem, several.stages) for p in part.parameters()}
    several.freeze_trunk()
    several.train()(images).square().mean().backward()
    without = {name for name, p in several.named_parameters() if p.grad is None and id(p) not in trunk}
    assert not without and not any(p.grad is not None for p in several.parameters() if id(p) in trunk)
