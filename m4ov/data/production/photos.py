"""What is true of the photos and scans that scikit-image carries, by its documentation and by looking at them; and the
continents of countries by ISO 3166 code."""

from __future__ import annotations

from typing import Any

_MOTORCYCLE: dict[str, Any] = {
    "topic": "things.transport.road",
    "label": "a motorcycle",
    "questions": [
        ["What colour is the tank of the motorcycle?", "red", "colour"],
        ["Which brand name is written on the tank?", "Yamaha", "word"],
        ["Which piece of furniture stands behind the motorcycle?", "a bench", "object"],
        ["Is the motorcycle in a garage or on a road?", "in a garage", "region"],
        ["How many wheels of the motorcycle can be seen?", "2", "counting"],
    ],
    "facts": {"vehicle in the middle of the image": {"value": "a motorcycle", "kind": "machine"}},
}

#: File in scikit-image's data folder → truth; boxes are in pixels of that file.
PHOTOS: dict[str, dict[str, Any]] = {
    "astronaut.png": {
        "topic": "people.portraits.figures",
        "label": "an astronaut",
        "objects": [
            {"label": "flag of the United States", "box": [0, 0, 95, 512], "attributes": {}},
            {"label": "model of a space shuttle", "box": [355, 0, 470, 285], "attributes": {}},
            {"label": "black helmet", "box": [280, 345, 512, 512], "attributes": {}},
        ],
        "facts": {
            "name of the astronaut in this portrait": {"value": "Eileen Collins", "kind": "person"},
            "country whose flag hangs at the left": {"value": "the United States", "kind": "country"},
        },
        "questions": [
            ["What colour is the suit of the astronaut?", "orange", "colour"],
            ["Which spacecraft does the model in the background show?", "the space shuttle", "machine"],
            ["What colour is the helmet in front?", "black", "colour"],
        ],
    },
    "brick.png": {
        "topic": "things.buildings.walls",
        "label": "a brick wall",
        "questions": [["What material is this surface made of?", "brick", "material"]],
    },
    "camera.png": {
        "topic": "people.activities.work",
        "label": "a man with a camera",
        "questions": [
            ["What stands on the tripod?", "a camera", "object"],
            ["Is this photograph in colour or in shades of grey?", "in shades of grey", "style"],
        ],
    },
    "cell.png": {
        "topic": "science.microscopy.cells",
        "label": "a cell",
        "facts": {"kind of instrument that made this image": {"value": "a microscope", "kind": "instrument"}},
    },
    "chelsea.png": {
        "topic": "nature.animals.pets",
        "label": "a cat",
        "facts": {
            "animal in this photograph": {
                "value": "a cat",
                "kind": "species",
                "choices": ["a dog", "a horse", "a rabbit"],
            }
        },
        "questions": [["Does the picture show the whole animal or its face?", "its face", "region"]],
    },
    "clock_motion.png": {
        "topic": "things.household.clocks",
        "label": "a clock",
        "questions": [["Is this photograph sharp or blurred by motion?", "blurred by motion", "blur"]],
    },
    "coffee.png": {
        "topic": "things.household.tableware",
        "label": "a cup of coffee",
        "objects": [
            {"label": "cup", "box": [172, 18, 410, 308], "attributes": {}},
            {"label": "saucer", "box": [76, 18, 480, 387], "attributes": {}},
            {"label": "spoon", "box": [325, 66, 425, 327], "attributes": {}},
        ],
        "facts": {
            "drink in the cup": {"value": "coffee", "kind": "culture", "choices": ["milk", "tea", "water"]},
        },
        "questions": [
            ["What colour is the inside of the cup?", "white", "colour"],
            ["What lies on the saucer beside the cup?", "a spoon", "object"],
            ["What is the table made of?", "wood", "material"],
            ["How many cups are there?", "1", "counting"],
        ],
    },
    "coins.png": {
        "topic": "things.household.coins",
        "label": "ancient coins",
        "facts": {"number of coins shown": {"value": "24", "kind": "counting"}},
        "questions": [
            ["In how many rows are the coins laid out?", "4", "counting"],
            ["Are the coins on a dark or on a light ground?", "on a dark ground", "colour"],
        ],
    },
    "color.png": {"topic": "shapes.colours.gradient", "label": "a colour wheel"},
    "grass.png": {
        "topic": "nature.plants.greenery",
        "label": "grass",
        "questions": [["Which plant covers this area?", "grass", "species"]],
    },
    "gravel.png": {
        "topic": "nature.land.stone",
        "label": "gravel",
        "questions": [["What is this ground made of?", "gravel", "material"]],
    },
    "horse.png": {
        "topic": "nature.animals.farm",
        "label": "the silhouette of a horse",
        "facts": {
            "animal in this picture": {"value": "a horse", "kind": "species", "choices": ["a cow", "a deer", "a dog"]}
        },
        "questions": [["Is this a photograph or a silhouette?", "a silhouette", "style"]],
    },
    "hubble_deep_field.jpg": {
        "topic": "science.astronomy.deep",
        "label": "galaxies",
        "facts": {"telescope that took this image": {"value": "the Hubble Space Telescope", "kind": "instrument"}},
    },
    "ihc.png": {
        "topic": "science.microscopy.tissue",
        "label": "stained tissue",
        "facts": {"kind of instrument that made this image": {"value": "a microscope", "kind": "instrument"}},
    },
    "logo.png": {
        "topic": "world.emblems.logos",
        "label": "a logo with the head of a snake",
        "questions": [["Which animal is part of this logo?", "a snake", "species"]],
    },
    "microaneurysms.png": {"topic": "science.medical.eye", "label": "blood vessels of a retina"},
    "moon.png": {
        "topic": "science.astronomy.moon",
        "label": "the surface of the moon",
        "facts": {
            "heavenly body shown here": {
                "value": "the moon",
                "kind": "science",
                "choices": ["Mars", "Venus", "the sun"],
            }
        },
    },
    "motorcycle_left.png": _MOTORCYCLE,
    "motorcycle_right.png": _MOTORCYCLE,
    "page.png": {
        "topic": "scans.print.uneven",
        "label": "a printed page",
        "facts": {
            "heading of this page": {"value": "Region-based segmentation", "kind": "lookup"},
            "thing whose markers the text wants to determine": {
                "value": "the coins and the background",
                "kind": "lookup",
            },
        },
        "questions": [
            ["What does the line of code on the page say?", ">>> markers = np.zeros_like(coins)", "line"],
            ["With which words does the first paragraph begin?", "Let us first determine", "line"],
            ["Is this page typed or written by hand?", "typed", "style"],
        ],
    },
    "phantom.png": {"topic": "science.medical.tomography", "label": "a test image for tomography"},
    "retina.jpg": {
        "topic": "science.medical.eye",
        "label": "a retina",
        "facts": {"organ that this image was taken of": {"value": "the eye", "kind": "science"}},
    },
    "rocket.jpg": {
        "topic": "things.transport.rockets",
        "label": "a rocket",
        "facts": {
            "rocket on this photograph": {"value": "Falcon 9", "kind": "machine"},
            "company that built this rocket": {"value": "SpaceX", "kind": "culture"},
        },
    },
    "text.png": {
        "topic": "scans.handwriting.formulae",
        "label": "a handwritten formula",
        "questions": [
            ["Is this text printed or written by hand?", "written by hand", "style"],
            ["Is the paper plain or ruled with lines?", "ruled with lines", "style"],
        ],
    },
}

#: Leaf of ``world.flags`` → ISO 3166 codes of the countries; the rest are territories.
CONTINENTS = {
    "africa": """
        AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG ER ET GA GH GM GN GQ GW KE KM LR LS LY MA MG ML MR MU MW MZ NA NE NG
        RW SC SD SL SN SO SS ST SZ TD TG TN TZ UG ZA ZM ZW""",
    "americas": """
        AG AR BB BO BR BS BZ CA CL CO CR CU DM DO EC GD GT GY HN HT JM KN LC MX NI PA PE PY SR SV TT US UY VC VE""",
    "asia": """
        AE AF AM AZ BD BH BN BT CN GE ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB LK MM MN MV MY NP OM PH PK PS QA SA
        SG SY TH TJ TL TM TR TW UZ VN YE""",
    "europe": """
        AD AL AT BA BE BG BY CH CY CZ DE DK EE ES FI FR GB GR HR HU IE IS IT LI LT LU LV MC MD ME MK MT NL NO PL PT RO
        RS RU SE SI SK SM UA VA""",
    "oceania": "AU FJ FM KI MH NR NZ PG PW SB TO TV VU WS",
}
