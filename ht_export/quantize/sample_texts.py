"""Short texts of many kinds, to see which numbers of a row are large where no prompts are given to calibrate on."""

from __future__ import annotations

TEXTS = (
    "The harbour was quiet when Mara rowed out past the breakwater. Fog lay on the water like wool, and "
    "the bell on the outer buoy sounded only now and then. She had promised her father that she would be "
    "back before noon; she had not told him about the letter, nor about the stranger who had left it under "
    "the door. 'Two hours,' she said to the oars, 'and then we shall know.' Somewhere ahead a gull cried "
    "twice, and the grey shape of the island came slowly out of the mist, larger than she remembered it.",
    'def moving_average(values, width):\n    """Return the mean of each `width` neighbours."""\n    if '
    "width < 1:\n        raise ValueError(f'width must be positive, not {width}')\n    total, means = 0.0, "
    "[]\n    for index, value in enumerate(values):\n        total += value\n        if index >= "
    "width:\n            total -= values[index - width]\n        if index >= width - 1:\n            "
    "means.append(total / width)\n    return means\n\n\n"
    "class Account:\n    def __init__(self, owner, balance=0):\n        self.owner = owner\n        "
    "self.balance = balance\n\n    def deposit(self, amount):\n        self.balance += amount\n        "
    "return self.balance\n",
    "Question: A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive?\n"
    "Answer: The journey takes 210 / 84 = 2.5 hours, which is 2 hours and 30 minutes. 9:40 plus 2:30 is "
    "12:10. The train arrives at 12:10.\n\n"
    "Question: What is 15 % of 260?\n"
    "Answer: 10 % of 260 is 26 and 5 % is 13, so 15 % is 26 + 13 = 39.\n\n"
    "Question: Solve 3x - 7 = 2x + 5.\n"
    "Answer: Subtract 2x from both sides: x - 7 = 5. Add 7: x = 12.",
    "Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung, weil ein Baum auf den Gleisen liegt. Wir "
    "bitten um Ihr Verständnis. Le marché ouvre à huit heures ; on y trouve du pain, des fromages et des "
    "fleurs de saison. ¿Dónde está la biblioteca? Siga todo recto y gire a la derecha después del puente. "
    "Il gatto dorme sul tetto mentre piove. Сегодня холодно, но солнце светит. 今日は天気がいいですね。 हम कल सुबह "
    "मिलेंगे।",
    '{"order": 48213, "customer": {"name": "Ines Vogel", "email": "ines@example.org"}, "items": [{"sku": '
    '"KB-104", "title": "Keyboard", "price": 49.9, "count": 1}, {"sku": "CB-020", "title": "USB cable, 2 '
    'm", "price": 7.5, "count": 3}], "paid": true, "note": null}\n\n'
    "| city | population | area (km2) |\n"
    "| --- | ---: | ---: |\n"
    "| Lisbon | 545,000 | 100 |\n"
    "| Oslo | 709,000 | 454 |\n\n"
    '<ul class="menu">\n  <li><a href="/home">Home</a></li>\n  <li>About us</li>\n'
    "</ul>\n\n"
    "SELECT name, COUNT(*) FROM visits WHERE day >= '2024-05-01' GROUP BY name;",
    "Photosynthesis is how green plants make sugar from carbon dioxide and water. Light is absorbed by "
    "chlorophyll in the chloroplasts; its energy splits water, which sets oxygen free, and is stored in "
    "molecules that the cell can spend later. In a second stage, known as the Calvin cycle, the enzyme "
    "RuBisCO binds carbon dioxide. Temperature, light and the amount of water all limit how fast this "
    "goes. About half of the oxygen in the air comes from algae in the sea.",
    "Dear Mr. Okafor,\n\n"
    "Thank you for your application for the position of laboratory assistant. We were impressed by your "
    "experience, and would like to invite you to an interview on Tuesday, 14 March, at 10:30 a.m. in room "
    "B-207. Please bring your certificates and one form of identification. If this date does not suit you, "
    "reply to this message or call 555-0148 by Friday.\n\n"
    "Kind regards,\n"
    "Helen Marsh\n"
    "Human Resources",
    "1. Preheat the oven to 180 °C and butter a 24 cm tin.\n"
    "2. Beat 3 eggs with 150 g of sugar until pale.\n"
    "3. Fold in 200 g of flour, 1 teaspoon of baking powder and a pinch of salt.\n"
    "4. Add 100 ml of milk, 80 g of melted butter and the zest of a lemon.\n"
    "5. Bake for 35 to 40 minutes; a skewer should come out clean.\n\n"
    "Tip: the cake keeps for three days in a closed box. Serve with yoghurt, berries or a cup of strong "
    "tea!",
    "User: My laptop will not start. What can I do?\n"
    "Assistant: I'm sorry to hear that. First, please check whether the charger is plugged in and its "
    "light is on. Then hold the power button for 15 seconds, let go, and press it once.\n"
    "User: The light is on, but the screen stays black.\n"
    "Assistant: That helps. Try an external monitor: if it shows a picture, the display or its cable is at "
    "fault. If not, remove all USB devices and try again. Do you hear any beeps?",
    "In 1869 the last spike joined two railways and made it possible to cross the continent in a week. "
    "Prices of grain fell in the cities, and whole towns moved to be near a station. Critics, however, "
    "pointed to the land that was taken, the workers who were never paid, and the herds that vanished "
    "within two decades. Historians still argue over how much of the century's growth was due to rails: "
    "estimates range from 2 to nearly 10 percent of national income.",
    "Roses are red, the river is wide,\n"
    "the lamps of the town are asleep on the tide;\n"
    "who walks on the bridge with a coat made of rain\n"
    "and counts every window, and counts them again?\n\n"
    "The play has three acts. In the first, a king gives away his crown; in the second, nobody wants it; "
    'in the third, a child finds it in a ditch and sells it for apples. Critics called it "slow, strange '
    'and very funny". I laughed twice, cried once and missed my bus.',
    "WARNING: disk usage at 91% on /dev/sda1\n"
    'Traceback (most recent call last):\n  File "main.py", line 12, in <module>\n    run(sys.argv[1])\n'
    "IndexError: list index out of range\n"
    "$ git status\n"
    "On branch main\n"
    "nothing to commit, working tree clean\n\n"
    "To compute the area of a circle, use A = πr². For r = 3: A ≈ 28.27. By Euler's formula, e^{iπ} + 1 = "
    "0. If P(A) = 0.3 and P(B) = 0.5 are independent, then P(A ∩ B) = 0.15.",
)
