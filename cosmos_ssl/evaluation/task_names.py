"""The tasks of ``cosmos-ssl eval`` by name; ``cosmos_ssl.evaluation.tasks`` has a function of each name.

Imports nothing, so that ``--help`` needs no torch.
"""

PURPOSES = {
    "retrieval": "image-text retrieval: COCO (2017, or Karpathy's split of 2014), Flickr30k, Urban-1k, DCI, "
    "DOCCI, shards, a folder with texts",
    "classification": "zero-shot: ImageNet (val/WNID/), -V2, -A, -R, -Sketch, ObjectNet, the ten sets of "
    "torchvision's readers, a folder a class, shards with labels",
    "knn": "nearest neighbours on frozen features, of the same data and its training split",
    "linear_probe": "logistic regression on frozen features, likewise",
    "attentive_probe": "a learned pooling of frozen patches and a linear classifier, likewise",
    "segmentation": "zero-shot, by SCLIP's protocol: VOC, Context, COCO, Cityscapes, ADE20K, shards with mask.png",
    "mmvp": "MMVP-VLM: which of two pictures a text is of (Questions.csv)",
    "sugarcrepe": "which of two texts a picture is of (add_att.json ..., COCO's val2017/)",
    "winoground": "both (examples.jsonl, images/)",
    "aro": "ARO's relations and attributes: which of two texts a part of a picture is of (visual_genome_relation.json "
    "..., images/)",
}
"""Task -> what it is for."""
ALL = "all"
"""Every task that there is data for."""
ON_FEATURES = ("knn", "linear_probe", "attentive_probe")
"""Those that read no text, and of which nothing is published: what is published of a set is zero-shot."""
